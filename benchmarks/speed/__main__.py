"""python -m benchmarks.speed: every loss beside torchrl's and the hardware's limit, in one process."""

from benchmarks.speed.command import main

if __name__ == "__main__":
    main()
