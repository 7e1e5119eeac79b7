# The paper's experiments on a laptop. The files have the names of those in configs/paper/, so that
# tables can show our rows beside the paper's. Each file says which value of the paper its own value
# stands for. In each of the paper's families, all members see the same tokens.
data = "data/python"        # bytes
n_layer = 8                 # stands for the paper's 16; depths are halved: 6 to 16 for 12 to 32
n_head = 4                  # allows G = 1, 2 and 4
n_embd = 64                 # narrow: 16 layers train in minutes on one core
init_std = 0.113            # 0.02 * sqrt(2048 / n_embd): an untrained block adds as much variance as
                            # the paper's of width 2048. With 0.02 it adds less than 1/2,000 of that,
                            # and after training, block 0 adds more than an average later block
block_size = 128            # stands for 2048; contexts are a sixteenth: 16 ... 512 for 256 ... 8192

learning_rate = 3e-3        # the best of four rates on seed 100, for this width and 2,000 steps
max_steps = 2000            # usefulness with 8 layers is then mid-range, so it can rise or fall
tokens_per_step = 1024      # 2M tokens in all, so that a run takes minutes on one core
warmup_steps = 100          # 5%, as in the paper's depth runs (1,000 of 19,000)
weight_decay = 0.064        # stands for 0.1. The effect of decay depends on the product
                            # learning_rate x weight_decay x steps. At 0.64 times the paper's decay,
                            # the product is that of configs/paper/weight_decay_*.py, whose learning
                            # rate is our guess. The paper's other families have other numbers of
                            # steps: our product is 0.5 (depth), 2 (gqa, moe, ladder) or 4 (context)
                            # times theirs. With one decay, all families share one baseline
eval_interval = 500
save_interval = 500         # an interrupted run repeats at most this many steps
