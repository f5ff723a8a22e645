"""Graphs, point clouds, physics and tables."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reports.zoo.entries import Step, step, workload
from reports.zoo.workloads.parts import images


def _graphs(count: int = 8) -> list[Any]:
    from torch_geometric.data import Data

    return [
        Data(
            x=torch.randn(1000, 16),
            edge_index=torch.randint(1000, (2, 4000)),
            y=torch.randint(3, (1,)),
        )
        for _ in range(count)
    ]


class _Graphs(nn.Module):
    """Layers over a batch of graphs, pooled to one answer each."""

    def __init__(self, layers: list[nn.Module], width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(width, 3)

    def forward(self, data: Any) -> Tensor:
        from torch_geometric.nn import global_mean_pool

        x = data.x
        for layer in self.layers:
            x = layer(x, data.edge_index).relu()
        return self.head(global_mean_pool(x, data.batch))  # type: ignore[no-any-return]


def _classified(model: nn.Module, data: Any) -> Tensor:
    return F.cross_entropy(model(data), data.y)


@workload("torch-geometric")
def graph_convolutions() -> Step:
    """GCN of PyTorch Geometric on a Batch of graphs."""
    from torch_geometric.data import Batch
    from torch_geometric.nn import GCNConv

    model = _Graphs([GCNConv(16, 256), GCNConv(256, 256)], 256)
    sample = Batch.from_data_list(_graphs(4))
    return step(model, target=256, gpu="t4", sample=sample, loss=_classified)


@workload("torch-geometric")
def graph_isomorphism() -> Step:
    """GIN of PyTorch Geometric from its DataLoader."""
    from torch_geometric.loader import DataLoader
    from torch_geometric.nn import GINConv

    def mlp(inputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 256))

    model = _Graphs([GINConv(mlp(16)), GINConv(mlp(256))], 256)
    loader = DataLoader(_graphs(64), batch_size=8)
    return step(model, target=64, gpu="t4", sample=loader, loss=_classified)


@workload("torch-geometric")
def graph_attention() -> Step:
    """GAT of PyTorch Geometric, with a softmax over the edges of each node."""
    from torch_geometric.data import Batch
    from torch_geometric.nn import GATConv

    model = _Graphs([GATConv(16, 64, heads=4), GATConv(256, 256)], 256)
    sample = Batch.from_data_list(_graphs(4))
    return step(model, target=256, gpu="t4", sample=sample, loss=_classified)


@workload("gpytorch")
def gaussian_process() -> Step:
    """A sparse variational Gaussian process of GPyTorch, through a Cholesky."""
    import gpytorch

    class Process(gpytorch.models.ApproximateGP):  # type: ignore[misc]
        def __init__(self) -> None:
            points = torch.randn(32, 8)
            distribution = gpytorch.variational.CholeskyVariationalDistribution(32)
            super().__init__(
                gpytorch.variational.VariationalStrategy(
                    self, points, distribution, learn_inducing_locations=True
                )
            )
            self.mean = gpytorch.means.ConstantMean()
            self.kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())

        def forward(self, x: Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean(x), self.kernel(x))

    model = Process()
    likelihood = gpytorch.likelihoods.GaussianLikelihood()
    bound = gpytorch.mlls.VariationalELBO(likelihood, model, num_data=1000)
    both = [*model.parameters(), *likelihood.parameters()]
    return step(
        model,
        target=4096,
        sample=(torch.randn(4, 8), torch.randn(4)),
        loss=lambda model, batch: -bound(model(batch[0]), batch[1]),
        optimizer=torch.optim.Adam(both, lr=0.01),
        learned=list(likelihood.parameters()),
        on_cpu=(1024, 2048),
    )


@workload("neuraloperator")
def fourier_operator() -> Step:
    """A Fourier neural operator, with complex weights."""
    from neuralop.models import FNO

    model = FNO(n_modes=(8, 8), in_channels=1, out_channels=1, hidden_channels=32, n_layers=2)
    sample = (torch.randn(2, 1, 32, 32), torch.randn(2, 1, 32, 32))
    return step(model, target=512, sample=sample, loss=nn.MSELoss())


@workload("torchdiffeq")
def neural_ode() -> Step:
    """A neural ODE by torchdiffeq's Runge-Kutta of fixed steps."""
    from torchdiffeq import odeint

    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16))

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return self.net(y)  # type: ignore[no-any-return]

    times = torch.linspace(0.0, 1.0, 5)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        path = odeint(model, batch[0], times.to(batch[0]), method="rk4")
        return F.mse_loss(path[-1], batch[1])

    sample = (torch.randn(16, 16), torch.randn(16, 16))
    return step(Field(), target=65536, sample=sample, loss=loss, on_cpu=(64, 128))


@workload("torchsde")
def neural_sde() -> Step:
    """A neural SDE of torchsde, whose Brownian motion lives on the card."""
    import torchsde

    class Equation(nn.Module):
        noise_type, sde_type = "diagonal", "ito"

        def __init__(self) -> None:
            super().__init__()
            self.drift = nn.Linear(16, 16)
            self.diffusion = nn.Linear(16, 16)

        def f(self, t: Tensor, y: Tensor) -> Tensor:
            return self.drift(y)  # type: ignore[no-any-return]

        def g(self, t: Tensor, y: Tensor) -> Tensor:
            return self.diffusion(y).sigmoid()  # type: ignore[no-any-return]

    def loss(model: nn.Module, y: Tensor) -> Tensor:
        times = torch.linspace(0, 1, 5, device=y.device)
        return torchsde.sdeint(model, y, times, dt=0.25).square().mean()  # type: ignore[no-any-return]

    return step(Equation(), target=65536, sample=torch.randn(16, 16), loss=loss, on_cpu=(512, 1024))


@workload("normflows")
def spline_flow() -> Step:
    """A flow of normflows with rational-quadratic splines."""
    import normflows as nf

    flows: list[Any] = []
    for _ in range(4):
        flows += [
            nf.flows.AutoregressiveRationalQuadraticSpline(8, 1, 64),
            nf.flows.LULinearPermute(8),
        ]
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(8, trainable=False), flows)
    return step(
        model,
        target=8192,
        sample=torch.randn(16, 8),
        loss=lambda model, x: model.forward_kld(x),
        on_cpu=(64, 128),
    )


@workload("zuko")
def masked_flow() -> Step:
    """A masked autoregressive flow of zuko, whose densities are lazy."""
    import zuko

    model = zuko.flows.MAF(features=8, context=4, transforms=3, hidden_features=(64, 64))
    return step(
        model,
        target=8192,
        sample=(torch.randn(16, 8), torch.randn(16, 4)),
        loss=lambda model, batch: -model(batch[1]).log_prob(batch[0]).mean(),
        on_cpu=(64, 128),
    )


@workload("e3nn")
def equivariant() -> Step:
    """Equivariant tensor products of e3nn."""
    from e3nn import o3

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = o3.FullyConnectedTensorProduct("8x0e + 4x1o", "1x0e + 1x1o", "8x0e + 4x1o")
            self.out = o3.Linear("8x0e + 4x1o", "1x0e")

        def forward(self, x: Tensor, direction: Tensor) -> Tensor:
            around = o3.spherical_harmonics("1x0e + 1x1o", direction, normalize=True)
            return self.out(self.inner(x, around))  # type: ignore[no-any-return]

    return step(
        Net(),
        target=8192,
        sample=(torch.randn(16, 20), torch.randn(16, 3)),
        loss=lambda model, batch: model(*batch).square().mean(),
        on_cpu=(64, 128),
    )


@workload("rtdl_revisiting_models")
def tables() -> Step:
    """FT-Transformer on columns of numbers and categories."""
    from rtdl_revisiting_models import FTTransformer

    model = FTTransformer(
        n_cont_features=10, cat_cardinalities=[4, 7], d_out=1, n_blocks=2, d_block=64,
        attention_n_heads=4, attention_dropout=0.0, ffn_d_hidden_multiplier=2, ffn_dropout=0.0,
        residual_dropout=0.0,
    )  # fmt: skip
    sample = (torch.randn(4, 10), torch.randint(4, (4, 2)), torch.randn(4))
    return step(
        model,
        target=8192,
        sample=sample,
        loss=lambda model, batch: F.mse_loss(model(*batch[:2]).squeeze(-1), batch[2]),
        optimizer=torch.optim.AdamW(model.make_parameter_groups()),
        on_cpu=(32, 64),
    )


@workload("pyro-ppl")
def probabilistic_autoencoder() -> Step:
    """A variational autoencoder written for Pyro, with its ELBO differentiable."""
    import pyro
    import pyro.distributions as dist
    from pyro.infer import Trace_ELBO

    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(784, 2 * 16)
            self.decoder = nn.Sequential(nn.Linear(16, 128), nn.Softplus(), nn.Linear(128, 784))

        def model(self, x: Tensor) -> None:
            pyro.module("decoder", self.decoder)
            with pyro.plate("data", x.shape[0]):
                zeros = x.new_zeros(x.shape[0], 16)
                z = pyro.sample("z", dist.Normal(zeros, zeros + 1).to_event(1))
                out = dist.Bernoulli(logits=self.decoder(z), validate_args=False).to_event(1)
                pyro.sample("x", out, obs=x)

        def guide(self, x: Tensor) -> None:
            pyro.module("encoder", self.encoder)
            with pyro.plate("data", x.shape[0]):
                loc, scale = self.encoder(x).chunk(2, -1)
                pyro.sample("z", dist.Normal(loc, F.softplus(scale) + 1e-3).to_event(1))

    def loss(model: Any, x: Tensor) -> Tensor:
        return Trace_ELBO().differentiable_loss(model.model, model.guide, x)  # type: ignore[no-any-return]

    return step(Autoencoder(), target=8192, sample=torch.rand(8, 784), loss=loss, on_cpu=(64, 128))


@workload("stable_baselines3")
def policy_step() -> Step:
    """The update of PPO with a policy of Stable Baselines."""
    import numpy as np
    from gymnasium import spaces
    from stable_baselines3.common.policies import ActorCriticCnnPolicy

    policy = ActorCriticCnnPolicy(
        spaces.Box(0, 255, (4, 84, 84), np.uint8), spaces.Discrete(6), lr_schedule=lambda _: 3e-4
    )

    def loss(model: Any, batch: Any) -> Tensor:
        seen, actions, old, advantages, returns = batch
        values, likelihood, entropy = model.evaluate_actions(seen, actions)
        ratio = torch.exp(likelihood - old)
        gain = torch.min(advantages * ratio, advantages * torch.clamp(ratio, 0.8, 1.2)).mean()
        return -gain + 0.5 * F.mse_loss(returns, values.flatten()) - 0.01 * entropy.mean()

    sample = (
        torch.randint(255, (4, 4, 84, 84), dtype=torch.uint8),
        torch.randint(6, (4,)),
        torch.randn(4),
        torch.randn(4),
        torch.randn(4),
    )
    return step(policy, target=2048, sample=sample, loss=loss, clip_norm=0.5)


@workload("torchrl", "tensordict")
def clipped_policy_loss() -> Step:
    """ClipPPOLoss of TorchRL on a TensorDict."""
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule
    from tensordict.nn.distributions import NormalParamExtractor
    from torchrl.modules import ProbabilisticActor, TanhNormal, ValueOperator
    from torchrl.objectives import ClipPPOLoss

    net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 8), NormalParamExtractor())
    actor = ProbabilisticActor(
        TensorDictModule(net, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        return_log_prob=True,
    )
    critic = ValueOperator(nn.Linear(16, 1), in_keys=["observation"])
    objective = ClipPPOLoss(actor, critic)
    rows = 8
    sample = TensorDict(
        {
            "observation": torch.randn(rows, 16),
            "action": torch.rand(rows, 4) * 1.8 - 0.9,
            "action_log_prob": torch.randn(rows),
            "advantage": torch.randn(rows, 1),
            "value_target": torch.randn(rows, 1),
        },
        batch_size=[rows],
    )

    def loss(model: nn.Module, batch: Any) -> Tensor:
        out = model(batch)
        return out["loss_objective"] + out["loss_critic"] + out["loss_entropy"]  # type: ignore[no-any-return]

    return step(objective, target=8192, sample=sample, loss=loss, on_cpu=(64, 128))


@workload()
def clicks() -> Step:
    """A recommender with embedding bags, their gradients dense."""

    class Clicks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = nn.EmbeddingBag(20000, 32, mode="sum")
            self.top = nn.Sequential(nn.Linear(32 + 13, 64), nn.ReLU(), nn.Linear(64, 1))

        def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
            return self.top(torch.cat([self.bag(ids), dense], dim=1))  # type: ignore[no-any-return]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        dense, ids, clicked = batch
        return F.binary_cross_entropy_with_logits(model(dense, ids).squeeze(1), clicked)

    sample = (torch.randn(8, 13), torch.randint(20000, (8, 26)), torch.randint(2, (8,)).float())
    model = Clicks()
    return step(
        model,
        target=8192,
        sample=sample,
        loss=loss,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        on_cpu="the bags' kernel keeps the bag of each row on a GPU, and not on the CPU",
        state=0.0,
    )


@workload()
def adversarial() -> Step:
    """DCGAN: two networks and two optimizers in one window."""
    from autobatch.workload.sample import batch_builder
    from autobatch.workload.workload import Workload

    class Gan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator = nn.Sequential(
                nn.ConvTranspose2d(64, 128, 8), nn.BatchNorm2d(128), nn.ReLU(),
                nn.ConvTranspose2d(128, 64, 4, 2, 1), nn.BatchNorm2d(64), nn.ReLU(),
                nn.ConvTranspose2d(64, 3, 4, 2, 1), nn.Tanh(),
            )  # fmt: skip
            self.critic = nn.Sequential(
                nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2),
                nn.Conv2d(64, 128, 4, 2, 1), nn.BatchNorm2d(128), nn.LeakyReLU(0.2),
                nn.Conv2d(128, 1, 8), nn.Flatten(),
            )  # fmt: skip

    model = Gan()
    first = torch.optim.Adam(model.generator.parameters(), 2e-4, (0.5, 0.999))
    second = torch.optim.Adam(model.critic.parameters(), 2e-4, (0.5, 0.999))

    def window(model: Any, optimizers: Any, batches: Any) -> None:
        for real in batches:
            z = torch.randn(real.shape[0], 64, 1, 1, device=real.device)
            false = model.generator(z)
            answers = model.critic(real), model.critic(false.detach())
            (F.softplus(-answers[0]).mean() + F.softplus(answers[1]).mean()).backward()
            second.step()
            second.zero_grad()
            F.softplus(-model.critic(false)).mean().backward()
            first.step()
            first.zero_grad()
            second.zero_grad()

    made = Workload(model=model, batch=batch_builder(images(4, 32)), window=window, optimizer=first)
    return step(made, target=256, state=2.0, on_cpu="two passes, of which the first is seen")


@workload()
def variational_autoencoder() -> Step:
    """The VAE of pytorch/examples."""

    class Vae(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc21 = nn.Linear(784, 400), nn.Linear(400, 20)
            self.fc22, self.fc3, self.fc4 = (
                nn.Linear(400, 20),
                nn.Linear(20, 400),
                nn.Linear(400, 784),
            )

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            h = F.relu(self.fc1(x.view(-1, 784)))
            mu, logvar = self.fc21(h), self.fc22(h)
            z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
            return torch.sigmoid(self.fc4(F.relu(self.fc3(z)))), mu, logvar

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, _ = batch
        out, mu, logvar = model(x)
        kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        return F.binary_cross_entropy(out, x.view(-1, 784), reduction="sum") + kl

    data = torch.utils.data.TensorDataset(torch.rand(256, 1, 28, 28), torch.randint(10, (256,)))
    return step(
        Vae(),
        target=128,
        sample=torch.utils.data.DataLoader(data, batch_size=16),
        loss=loss,
        on_cpu=(32, 64),
    )
