"""Drivers for the programs that run virtual machines. `base` is what a driver promises."""
