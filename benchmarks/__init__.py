"""Programs that show what the losses do; not part of the installed packages."""
