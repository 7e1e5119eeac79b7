# Dense, the counterpart of moe_1b.py: d = 64 stands for the paper's 2048.
base = "base.py"
