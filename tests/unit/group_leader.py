"""Says whether this process leads its process group: run by a test."""

import os

if __name__ == "__main__" and os.getpgrp() == os.getpid():
    print("it leads its group")
