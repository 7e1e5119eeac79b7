# The settings that the paper's runs share: the dense 1B model, 10B tokens of FineWeb-Edu, the
# released optimizer.
# Prepare the data with  python data.py fineweb-edu --max_tokens 10.5e9
data = "data/fineweb-edu"   # GPT-2's tokens. The paper uses GPT-NeoX's tokenizer (50280 tokens,
                            # padded to 50304), which tiktoken does not have
vocab_size = 50304
n_layer = 16
n_head = 16
n_embd = 2048               # SwiGLU hidden 8192 = 4 n_embd: 1.28B parameters with both embeddings

weight_decay = 0.1          # our choice: the best of the paper's sweep
learning_rate = 4e-4        # our choice: the peak is not stated
warmup_steps = 1000
block_size = 2048           # our choice: the context of these runs is not stated
tokens_per_step = 2**21     # about 2M, as in the GQA and MoE runs
max_steps = 4768            # 10B tokens
batch_size = 8              # sequences per pass and GPU, for 80 GB; no effect on dense results

eval_interval = 250
eval_tokens = 2**21
stats_interval = 50
save_interval = 250
