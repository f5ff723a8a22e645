# needs: optuna


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.LSTM(16, 32, batch_first=True), nn.Linear(32, 4)

    def forward(self, x):
        return self.head(self.layers(x)[0][:, -1])


recurrent = Recurrent()


def build(length):  # what `vary` varies
    def batch(n):
        return torch.randn(n, length, 16), torch.randint(4, (n,))

    return autobatch.Workload(model=recurrent, batch=batch, loss=loss_fn)
