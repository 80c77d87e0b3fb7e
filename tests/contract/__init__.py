"""The contract between Python and SQL, and the suite that each implementation of it passes."""
