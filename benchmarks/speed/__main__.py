"""python -m benchmarks.speed: every loss beside torchrl's and the hardware's limit, each case in its own process."""

from benchmarks.speed.command import main

if __name__ == "__main__":
    main()
