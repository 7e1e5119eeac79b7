# The ladder: T = 8192, which did not help.
base = "ladder_32.py"
block_size = 8192
batch_size = 1
