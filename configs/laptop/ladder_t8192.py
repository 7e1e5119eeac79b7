# The ladder: T = 512 instead of 256. It stands for the paper's 8192.
base = "ladder_32.py"
block_size = 512
