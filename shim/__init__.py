"""containerd's side: one process per pod that serves the Task API and drives `vc`.

The modules that `start` needs (`__main__`, `args`, `address`, `bootstrap`, `bundle`, `start`) import nothing
heavier than `os`: every pod pays for them before anything else happens.
"""
