"""What `build_guest` is made of: packages, the kernel, the initrd and the root file system of the guest.

Standard library only, and of Debian's own Python: this runs before anything of the project is installed.
Everything that ends up in an output file is a function of the fetched packages, guest.toml and the checkout,
so that the same inputs give the same bytes: no clock, no random UUID, no directory order, no owner of the
machine gets in.
"""
