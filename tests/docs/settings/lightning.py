# needs: lightning
import lightning


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.batch_size, self.net = 1, nn.Linear(16, 4)

    def training_step(self, batch):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())

    def train_dataloader(self):
        return DataLoader(data, batch_size=self.batch_size)


module = Module()
