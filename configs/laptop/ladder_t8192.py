# The ladder: T = 512, which stands for the paper's 8192, instead.
base = "ladder_32.py"
block_size = 512
