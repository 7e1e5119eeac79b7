# The ladder: weight decay 0.64, which stands for the paper's 1, instead.
base = "ladder_t4096.py"
weight_decay = 0.64
