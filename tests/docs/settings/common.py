# What the text of every page takes for known.
import autobatch
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
batch = torch.randn(8, 16), torch.randint(4, (8,))
data = TensorDataset(torch.randn(1024, 16), torch.randint(4, (1024,)))


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


optimizer = torch.optim.AdamW(model.parameters())
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
loader = DataLoader(data, batch_size=256)
plan = autobatch.tune(
    model, target=256, sample=batch, loss=loss_fn, optimizer=optimizer, gpu="a100-40gb"
)
