# The paper's experiments on a laptop: the same names as in configs/paper/, so that every row of a table has the paper's row
# beside it. Each file says what stands for what. All members of a family see the same tokens, in the same order per seed.
data = "data/python"        # bytes
n_layer = 8                 # stands for the paper's 16: depths are halved, 6 8 12 16 for 12 16 24 32
n_head = 4
n_embd = 64
block_size = 128            # stands for 2048: contexts are a sixteenth, 16 ... 512 for 256 ... 8192

learning_rate = 3e-3
max_steps = 2000
tokens_per_step = 1024
warmup_steps = 100
weight_decay = 0.064        # stands for 0.1. What decay does goes with learning_rate x weight_decay x steps: 6 times the decay
                            # here, 3.8 times in configs/paper/weight_decay_0_1.py, so decays are 0.64 times the paper's
eval_interval = 500
save_interval = 0           # only at the end: a run takes minutes
