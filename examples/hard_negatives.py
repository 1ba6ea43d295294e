"""Hard negatives for a recommender of your own, in plain PyTorch: `python examples/hard_negatives.py`.

A model of item vectors learns which item follows which. Each step ranks the whole catalog by the model's own scores and
trains against ranks [10, 500), half of them traded for uniform ones; no (B, V) tensor is made.
"""

import torch

import alterrec_fast as af

V, D, B = 20_000, 64, 256
torch.manual_seed(0)
follows = torch.randperm(V)  # the truth to be learnt
source = torch.nn.Embedding(V, D)
catalog = torch.nn.Embedding(V, D)
optimizer = torch.optim.Adam([*source.parameters(), *catalog.parameters()], lr=0.02)

for step in range(150):
    item = torch.randint(0, 2000, (B,))
    query = source(item)
    negatives = af.rank_slice(query, catalog.weight, start=10, stop=500).mix(0.5)
    loss = af.slice_cross_entropy(query, catalog.weight, follows[item], negatives)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    if step % 30 == 0:
        print(f"step {step:3d}  loss {loss.item():.3f}")

_, found = af.top_k(source.weight[:2000].detach(), catalog.weight.detach(), k=20)
hits = (found == follows[:2000, None]).any(1).float().mean()
print(f"Hits@20 over the items seen: {hits:.3f}")
