"""Diffusion models: schedules in closures, averages of weights, latent spaces."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autobatch.workload.sample import batch_builder
from autobatch.workload.workload import Workload
from reports.zoo.entries import Step, step, workload
from reports.zoo.workloads.parts import images


def _unet(**changes: Any) -> Any:
    from diffusers import UNet2DModel

    options: dict[str, Any] = {
        "sample_size": 32,
        "block_out_channels": (64, 64, 128),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DModel(**(options | changes))


@workload("diffusers")
def ddpm() -> Step:
    """The unconditional script of diffusers: a schedule adds noise at random times."""
    from diffusers import DDPMScheduler

    schedule = DDPMScheduler(num_train_timesteps=1000)

    def loss(model: nn.Module, clean: Tensor) -> Tensor:
        noise = torch.randn_like(clean)
        times = torch.randint(0, 1000, (clean.shape[0],), device=clean.device).long()
        noisy = schedule.add_noise(clean, noise, times)
        return F.mse_loss(model(noisy, times, return_dict=False)[0], noise)

    return step(_unet(), target=256, sample=images(2, 32), loss=loss)


@workload("diffusers")
def ddpm_min_snr() -> Step:
    """Losses weighed by the ratio of signal to noise at each time."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    schedule = DDPMScheduler(num_train_timesteps=1000)

    def loss(model: nn.Module, clean: Tensor) -> Tensor:
        noise = torch.randn_like(clean)
        times = torch.randint(0, 1000, (clean.shape[0],), device=clean.device)
        predicted = model(schedule.add_noise(clean, noise, times), times).sample
        snr = compute_snr(schedule, times)
        weights = torch.stack([snr, 5.0 * torch.ones_like(times)], dim=1).min(dim=1)[0] / snr
        errors = F.mse_loss(predicted, noise, reduction="none").mean(dim=(1, 2, 3))
        return (errors * weights).mean()

    return step(_unet(), target=256, sample=images(2, 32), loss=loss)


@workload("diffusers")
def ddpm_average() -> Step:
    """A window that keeps diffusers' average of the weights, made at its first call."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    schedule = DDPMScheduler()
    kept: dict[str, Any] = {}

    def window(model: nn.Module, optimizer: Any, batches: Any) -> None:
        if "average" not in kept:
            kept["average"] = EMAModel(model.parameters())
        for clean in batches:
            noise = torch.randn_like(clean)
            times = torch.randint(0, 1000, (clean.shape[0],), device=clean.device)
            output = model(schedule.add_noise(clean, noise, times), times).sample
            F.mse_loss(output, noise).backward()
        optimizer.step()
        kept["average"].step(model.parameters())
        optimizer.zero_grad()

    batch = batch_builder(images(2, 32))
    return step(Workload(model=_unet(), batch=batch, window=window), target=256)


@workload("diffusers", "transformers")
def latent_text_to_image() -> Step:
    """Stable Diffusion's script: VAE and text encoder frozen beside a conditional UNet."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=64,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=8,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(32, 64), layers_per_block=1, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    encoder = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            vocab_size=1000, bos_token_id=998, eos_token_id=999,
        )
    )  # fmt: skip
    vae.requires_grad_(False)
    encoder.requires_grad_(False)
    schedule = DDPMScheduler(num_train_timesteps=1000)

    def loss(unet: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        latents = vae.encode(batch["pixel_values"]).latent_dist.sample()
        latents = latents * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        times = torch.randint(0, 1000, (latents.shape[0],), device=latents.device).long()
        noisy = schedule.add_noise(latents, noise, times)
        states = encoder(batch["input_ids"], return_dict=False)[0]
        predicted = unet(noisy, times, states, return_dict=False)[0]
        return F.mse_loss(predicted.float(), noise.float(), reduction="mean")

    ids = torch.randint(0, 990, (2, 24))
    ids[:, -1] = 999
    sample = {"pixel_values": images(2, 32), "input_ids": ids}
    return step(unet, target=256, sample=sample, loss=loss)


@workload("diffusers", "peft")
def unet_lora() -> Step:
    """LoRA added to the attention of a UNet by diffusers."""
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from peft import LoraConfig

    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=64,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=8,
    )  # fmt: skip
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    schedule = DDPMScheduler()

    def loss(unet: nn.Module, batch: Any) -> Tensor:
        latents, states = batch
        noise = torch.randn_like(latents)
        times = torch.randint(0, 1000, (latents.shape[0],), device=latents.device)
        return F.mse_loss(
            unet(schedule.add_noise(latents, noise, times), times, states).sample, noise
        )

    sample = (torch.randn(2, 4, 16, 16), torch.randn(2, 24, 64))
    return step(unet, target=64, gpu="rtx-3060", sample=sample, loss=loss)


@workload("diffusers")
def diffusion_transformer() -> Step:
    """DiT of diffusers with class labels."""
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=32, in_channels=4, out_channels=4, num_layers=3,
        sample_size=16, num_embeds_ada_norm=1000,
    )  # fmt: skip

    def loss(model: nn.Module, batch: Any) -> Tensor:
        latents, labels = batch
        noise = torch.randn_like(latents)
        times = torch.randint(0, 1000, (latents.shape[0],), device=latents.device)
        return F.mse_loss(model(latents + noise, timestep=times, class_labels=labels).sample, noise)

    sample = (torch.randn(2, 4, 16, 16), torch.randint(1000, (2,)))
    return step(model, target=512, sample=sample, loss=loss)


@workload("diffusers")
def flow_matching() -> Step:
    """SD3's loss: flow matching, with sigmas looked up by the equality of times."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from diffusers.training_utils import compute_density_for_timestep_sampling

    model = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=64, caption_projection_dim=64,
        pooled_projection_dim=64, out_channels=4,
    )  # fmt: skip
    schedule = FlowMatchEulerDiscreteScheduler()

    def sigmas_of(times: Tensor, like: Tensor) -> Tensor:
        sigmas = schedule.sigmas.to(device=like.device, dtype=like.dtype)
        table = schedule.timesteps.to(like.device)
        indices = [(table == t).nonzero().item() for t in times.to(like.device)]
        return sigmas[indices].flatten().view(-1, 1, 1, 1)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        latents, states, pooled = batch
        noise = torch.randn_like(latents)
        u = compute_density_for_timestep_sampling("logit_normal", latents.shape[0], 0.0, 1.0)
        indices = (u * schedule.config.num_train_timesteps).long()
        times = schedule.timesteps[indices].to(latents.device)
        sigmas = sigmas_of(times, latents)
        noisy = (1.0 - sigmas) * latents + sigmas * noise
        predicted = model(
            hidden_states=noisy,
            timestep=times,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        return ((predicted - (noise - latents)) ** 2).mean()

    sample = (torch.randn(2, 4, 16, 16), torch.randn(2, 20, 64), torch.randn(2, 64))
    return step(model, target=256, sample=sample, loss=loss)


@workload("diffusers")
def flux() -> Step:
    """Flux's transformer, whose attention goes by keywords through a dispatcher."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=64, pooled_projection_dim=64,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip

    def loss(model: nn.Module, batch: Any) -> Tensor:
        packed, states, pooled = batch
        n, length = packed.shape[:2]
        noise = torch.randn_like(packed)
        predicted = model(
            hidden_states=packed,
            timestep=torch.rand(n, device=packed.device),
            pooled_projections=pooled,
            encoder_hidden_states=states,
            txt_ids=torch.zeros(states.shape[1], 3, device=packed.device),
            img_ids=torch.zeros(length, 3, device=packed.device),
            return_dict=False,
        )[0]
        return F.mse_loss(predicted, noise - packed)

    sample = (torch.randn(2, 64, 16), torch.randn(2, 16, 64), torch.randn(2, 64))
    return step(
        model,
        target=128,
        sample=sample,
        loss=loss,
        on_cpu="the CPU's attention kernel keeps other bytes than the GPU's",
        state=2.0,
    )


@workload("diffusers")
def autoencoder() -> Step:
    """The VAE of diffusers with its KL term."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        block_out_channels=(32, 64), layers_per_block=1, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip

    def loss(model: Any, x: Tensor) -> Tensor:
        posterior = model.encode(x).latent_dist
        return F.mse_loss(model.decode(posterior.sample()).sample, x) + posterior.kl().mean() * 1e-6

    return step(model, target=128, sample=images(2, 32), loss=loss, on_cpu=(64, 66))


@workload("denoising-diffusion-pytorch")
def gaussian_diffusion() -> Step:
    """lucidrains' GaussianDiffusion, whose forward pass is the loss."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    model = GaussianDiffusion(
        Unet(dim=32, dim_mults=(1, 2), flash_attn=False), image_size=32, timesteps=1000
    )
    return step(model, target=256, sample=images(2, 32))


@workload("denoising-diffusion-pytorch")
def gaussian_diffusion_flash() -> Step:
    """The same with flash attention, built by a function that finds the card."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    def build() -> nn.Module:
        with torch.random.fork_rng():
            unet = Unet(dim=32, dim_mults=(1, 2), flash_attn=True)
            return GaussianDiffusion(unet, image_size=32, timesteps=1000)

    made = step(
        build,
        target=256,
        sample=images(2, 32),
        on_cpu="the CPU's attention kernel keeps other bytes than the GPU's",
        state=2.0,
    )
    return Step(plan=made.plan, model=build(), on_cpu=made.on_cpu, state=2.0)


@workload("ema-pytorch", "rectified-flow-pytorch")
def rectified_flow() -> Step:
    """Rectified flow with its own loss, over a UNet of the same package."""
    from rectified_flow_pytorch import RectifiedFlow, Unet

    model = RectifiedFlow(Unet(dim=32, dim_mults=(1, 2), flash_attn=False))
    return step(model, target=256, sample=images(2, 32))
