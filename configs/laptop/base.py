# The paper's experiments on a laptop: the same names as in configs/paper/, so that every row of a table has the paper's
# beside it. Each file says what stands for what. All members of a family see the same tokens.
data = "data/python"        # bytes
n_layer = 8                 # stands for the paper's 16: depths are halved, 6 8 12 16 for 12 16 24 32
n_head = 4                  # so that G = 1, 2, 4
n_embd = 64                 # narrow, so that 16 layers train in minutes on a core: it is depth that is studied
init_std = 0.113            # 0.02 * sqrt(2048 / n_embd). The paper's 0.02 at width 2048 is 0.905 / sqrt(width): a block
                            # then adds the variance that it adds in the paper. With 0.02 at width 64 it adds a
                            # thousandth of that, and training lets block 0 dominate the stream
block_size = 128            # stands for 2048: contexts are a sixteenth, 16 ... 512 for 256 ... 8192

learning_rate = 3e-3        # what a model this narrow takes; with 2,000 steps of it the curse shows: usefulness at 8
max_steps = 2000            # layers is in the middle of its range, so that a member can be better or worse
tokens_per_step = 1024      # half of train.py's default, so that a run takes minutes on one core; 2M tokens in all
warmup_steps = 100          # 5%, the share of the paper's depth runs (1,000 of 19,000)
weight_decay = 0.064        # stands for 0.1. What decay does goes with learning_rate x weight_decay x steps, so decays
                            # are 0.64 times the paper's: then the product is that of configs/paper/weight_decay_*.py,
                            # whose learning rate is our guess. In the other families, whose steps the paper sized
                            # differently, it is 0.5 (depth), 2 (gqa, moe, ladder) and 4 (context) times that of
                            # configs/paper: one decay for all, so that the families share their baseline
eval_interval = 500
save_interval = 500         # what an interrupted run has to do again at the most
