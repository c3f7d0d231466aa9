"""The QEMU driver: `machines` and `command` decide the command line, `qmp` the commands, `driver` runs it."""
