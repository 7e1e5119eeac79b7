base = "ladder_32.py"
block_size = 256
