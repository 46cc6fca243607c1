"""What is read from the host and kept on it: processes, files of others, our own state on disk.

`processes` reads /proc, `files` opens what others own, `state` keeps our notes and locks.  Nothing
here depends on QMP or QEMU.
"""
