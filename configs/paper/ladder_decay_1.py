# The ladder: weight decay 1.0, which helped less than 0.3.
base = "ladder_t4096.py"
weight_decay = 1
