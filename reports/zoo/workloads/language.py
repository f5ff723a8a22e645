"""Language models: pretraining scripts, encoders, recurrent and state-space ones, experts."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autobatch.workload.sample import batch_builder
from autobatch.workload.workload import Workload
from reports.zoo.entries import Step, step, workload
from reports.zoo.workloads.parts import llama, tokens


class _Block(nn.Module):
    """As in nanoGPT."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.ln_1 = nn.LayerNorm(width, bias=False)
        self.c_attn = nn.Linear(width, 3 * width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)
        self.ln_2 = nn.LayerNorm(width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.c_attn(self.ln_1(x)).split(c, dim=2)
        q, k, v = (y.view(b, t, self.heads, c // self.heads).transpose(1, 2) for y in (q, k, v))
        weights = (q @ k.transpose(-2, -1)) / math.sqrt(k.size(-1))
        hidden = torch.ones(t, t, device=x.device).tril() == 0
        y = F.softmax(weights.masked_fill(hidden, float("-inf")), dim=-1) @ v
        x = x + self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))
        return x + self.mlp(self.ln_2(x))


class _Gpt(nn.Module):
    def __init__(self, layers: int = 6, width: int = 384, block: int = 256, vocab: int = 8192):
        super().__init__()
        self.wte = nn.Embedding(vocab, width)
        self.wpe = nn.Embedding(block, width)
        self.h = nn.ModuleList(_Block(width, 6) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width, bias=False)
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        pos = torch.arange(idx.size(1), device=idx.device)
        x = self.wte(idx) + self.wpe(pos)
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
        return logits, loss


@workload()
def nanogpt() -> Step:
    """A nanoGPT of its own source, two groups of weight decay, bf16, clipped."""
    model = _Gpt()
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    return step(
        model,
        target=480,
        sample=(tokens(2, 256), tokens(2, 256)),
        loss=lambda model, batch: model(*batch)[1],
        optimizer=torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95)),
        autocast="bf16",
        clip_norm=1.0,
    )


@workload()
def nanogpt_window() -> Step:
    """The nanoGPT loop as a window of one's own, with a schedule and a learning rate it sets."""
    model = _Gpt()
    rates = {"step": 0}

    def window(model: nn.Module, optimizer: Any, batches: Any) -> None:
        rates["step"] += 1
        for group in optimizer.param_groups:
            group["lr"] = 6e-4 * min(1.0, rates["step"] / 100)
        for x, y in batches:
            _, loss = model(x, y)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    batch = batch_builder((tokens(2, 256), tokens(2, 256)))
    return step(Workload(model=model, batch=batch, window=window), target=480)


@workload()
def checkpointed_blocks() -> Step:
    """A GPT whose blocks are recomputed with torch.utils.checkpoint."""
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(_Gpt):
        def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            x = self.wte(idx) + self.wpe(torch.arange(idx.size(1), device=idx.device))
            for block in self.h:
                x = checkpoint(block, x, use_reentrant=False)
            logits = self.lm_head(self.ln_f(x))
            return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return step(
        Checkpointed(),
        target=512,
        sample=(tokens(2, 256), tokens(2, 256)),
        loss=lambda model, batch: model(*batch)[1],
    )


@workload("transformers")
def gpt2() -> Step:
    """GPT-2 of transformers on its own labels."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=4, n_embd=256, n_head=4, vocab_size=8192,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        attn_implementation="eager",
    )  # fmt: skip
    ids = tokens(2, 256)
    return step(
        GPT2LMHeadModel(config),
        target=256,
        sample={"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids},
    )


@workload("transformers")
def llama_checkpointing() -> Step:
    """Llama with gradient checkpointing of transformers, bf16 weights."""
    model = llama().to(torch.bfloat16)
    model.gradient_checkpointing_enable()
    ids = tokens(2, 256)
    return step(model, target=256, sample={"input_ids": ids, "labels": ids}, optimizer="adamw")


@workload("transformers")
def bert_masked() -> Step:
    """BERT on masked tokens, most labels ignored."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        num_hidden_layers=4, hidden_size=256, num_attention_heads=4, intermediate_size=1024,
        vocab_size=8192, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )  # fmt: skip
    ids = tokens(2, 128)
    labels = torch.where(torch.rand(2, 128) < 0.15, ids, -100)
    return step(
        BertForMaskedLM(config),
        target=1024,
        sample={"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels},
    )


@workload("transformers")
def t5_translation() -> Step:
    """T5 with Adafactor of transformers."""
    from transformers import T5Config, T5ForConditionalGeneration
    from transformers.optimization import Adafactor

    config = T5Config(
        num_layers=3,
        d_model=256,
        d_ff=1024,
        num_heads=4,
        vocab_size=8192,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        attn_implementation="eager",
    )
    model = T5ForConditionalGeneration(config)
    return step(
        model,
        target=256,
        sample={"input_ids": tokens(2, 128), "labels": tokens(2, 64)},
        optimizer=Adafactor(model.parameters(), lr=1e-3, relative_step=False),
    )


@workload("transformers")
def modernbert_classifier() -> Step:
    """ModernBERT that classifies sentences, collated by a DataLoader with padding."""
    from transformers import ModernBertConfig, ModernBertForSequenceClassification

    config = ModernBertConfig(
        num_hidden_layers=4, hidden_size=256, num_attention_heads=4, intermediate_size=384,
        vocab_size=8192, num_labels=3, pad_token_id=0, attn_implementation="eager",
        cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    data = [(tokens(1, length)[0], length % 3) for length in (40, 64, 96, 128)]

    def collate(rows: Any) -> dict[str, Tensor]:
        ids = nn.utils.rnn.pad_sequence([ids for ids, _ in rows], batch_first=True)
        labels = torch.tensor([label for _, label in rows])
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}

    loader = torch.utils.data.DataLoader(data, batch_size=2, collate_fn=collate)  # type: ignore[arg-type]
    return step(ModernBertForSequenceClassification(config), target=512, sample=loader)


@workload("transformers")
def mamba() -> Step:
    """Mamba of transformers, by its path without kernels."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        num_hidden_layers=2, hidden_size=128, state_size=8, vocab_size=1024, use_cache=False
    )
    ids = tokens(2, 64, 1024)
    return step(MambaForCausalLM(config), target=512, sample={"input_ids": ids, "labels": ids})


@workload("xlstm", "transformers")
def xlstm() -> Step:
    """xLSTM, its blocks in plain PyTorch."""
    from xlstm import (
        FeedForwardConfig,
        mLSTMBlockConfig,
        mLSTMLayerConfig,
        xLSTMBlockStack,
        xLSTMBlockStackConfig,
    )

    config = xLSTMBlockStackConfig(
        mlstm_block=mLSTMBlockConfig(
            mlstm=mLSTMLayerConfig(conv1d_kernel_size=4, qkv_proj_blocksize=4, num_heads=4)
        ),
        context_length=128,
        num_blocks=3,
        embedding_dim=128,
        slstm_at=[],
    )
    del FeedForwardConfig
    return step(
        xLSTMBlockStack(config),
        target=256,
        sample=torch.randn(2, 128, 128),
        loss=lambda model, batch: F.mse_loss(model(batch), batch),
    )


@workload("mambapy")
def mamba_in_pytorch() -> Step:
    """mambapy with its parallel scan, a custom autograd function."""
    from mambapy.mamba import Mamba, MambaConfig

    return step(
        Mamba(MambaConfig(d_model=64, n_layers=2)),
        target=512,
        sample=torch.randn(2, 64, 64),
        loss=lambda model, batch: model(batch).square().mean(),
    )


@workload("x-transformers")
def x_transformers() -> Step:
    """An autoregressive decoder with rotary positions and grouped queries."""
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    model = AutoregressiveWrapper(
        TransformerWrapper(
            num_tokens=8192,
            max_seq_len=256,
            attn_layers=Decoder(dim=256, depth=4, heads=4, rotary_pos_emb=True, attn_kv_heads=2),
        )
    )
    return step(model, target=256, sample=tokens(2, 257))


@workload("performer-pytorch")
def performer() -> Step:
    """A Performer, whose random projections are buffers that it draws anew."""
    from performer_pytorch import PerformerLM

    model = PerformerLM(
        num_tokens=2048, max_seq_len=256, dim=128, depth=3, heads=4, causal=False, dim_head=32
    )
    return step(
        model,
        target=256,
        sample=tokens(2, 256, 2048),
        loss=lambda model, ids: F.cross_entropy(model(ids).transpose(1, 2), ids),
    )


@workload()
def recurrent() -> Step:
    """An LSTM over time first, with its state carried over and detached."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Embedding(4096, 128)
            self.rnn = nn.LSTM(128, 128, 2)
            self.decoder = nn.Linear(128, 4096)

        def forward(self, ids: Tensor) -> Tensor:
            return self.decoder(self.rnn(self.encoder(ids))[0])  # type: ignore[no-any-return]

    batch = batch_builder((tokens(35, 3, 4096), tokens(35, 3, 4096)), batch_dims=1)
    return step(
        Workload(
            model=Net(),
            batch=batch,
            loss=lambda model, batch: F.cross_entropy(
                model(batch[0]).flatten(0, 1), batch[1].flatten()
            ),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=20.0),
        ),
        target=2048,
        on_cpu="cuDNN's recurrent layers keep other bytes than the CPU's",
        state=0.0,
    )


class _Experts(nn.Module):
    """Tokens go to the expert that scores most, found by `where`."""

    def __init__(self, width: int = 128, experts: int = 8):
        super().__init__()
        self.gate = nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.gate(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            (rows,) = torch.where(chosen == index)
            out.index_add_(0, rows, expert(flat[rows]) * weights[rows, None])
        return out.view_as(x)


@workload()
def experts_by_where() -> Step:
    """A mixture of experts by hand: each takes the tokens that were sent to it."""
    model = nn.Sequential(nn.Embedding(2048, 128), _Experts(), nn.Linear(128, 2048))
    return step(
        model,
        target=1024,
        sample=(tokens(2, 128, 2048), tokens(2, 128, 2048)),
        loss=lambda model, batch: F.cross_entropy(model(batch[0]).transpose(1, 2), batch[1]),
    )


@workload("transformers")
def mixtral() -> Step:
    """Mixtral of transformers with its loss that balances experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        num_hidden_layers=2, hidden_size=128, intermediate_size=256, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, vocab_size=2048, output_router_logits=True,
        attn_implementation="eager", experts_implementation="eager", use_cache=False,
    )  # fmt: skip
    ids = tokens(2, 128, 2048)
    return step(MixtralForCausalLM(config), target=512, sample={"input_ids": ids, "labels": ids})


@workload("transformers")
def qwen_experts() -> Step:
    """Qwen3-MoE of transformers, experts one after the other."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        num_hidden_layers=2, hidden_size=128, moe_intermediate_size=128, num_attention_heads=4,
        num_key_value_heads=2, num_experts=8, num_experts_per_tok=2, vocab_size=2048,
        head_dim=32, attn_implementation="eager", experts_implementation="eager", use_cache=False,
    )  # fmt: skip
    ids = tokens(2, 128, 2048)
    return step(Qwen3MoeForCausalLM(config), target=512, sample={"input_ids": ids, "labels": ids})


@workload("soft-moe-pytorch")
def soft_experts() -> Step:
    """Soft mixture of experts."""
    from soft_moe_pytorch import SoftMoE

    model = SoftMoE(dim=128, seq_len=256, num_experts=4)
    return step(
        model,
        target=512,
        sample=torch.randn(2, 256, 128),
        loss=lambda model, x: F.mse_loss(model(x) + x, x.flip(1)),
    )


@workload("st-moe-pytorch")
def routed_experts() -> Step:
    """ST-MoE with its capacity and auxiliary losses."""
    from st_moe_pytorch import MoE

    model = MoE(dim=128, num_experts=8, gating_top_n=2)
    return step(
        model,
        target=512,
        sample=torch.randn(2, 128, 128),
        loss=lambda model, x: (lambda out: out[0].square().mean() + out[1])(model(x)),
    )


@workload("liger-kernel", "transformers")
def liger() -> Step:
    """Llama with Liger's kernels and its fused linear cross entropy."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama()
    ids = tokens(2, 256)
    return step(
        llama(),
        target=512,
        sample={"input_ids": ids, "labels": ids},
        autocast="bf16",
        on_cpu="Triton's kernels run on a GPU alone",
        state=2.0,
    )


@workload("flash-linear-attention", "transformers")
def gated_linear_attention() -> Step:
    """GLA of flash-linear-attention, all kernels Triton's."""
    from fla.models import GLAConfig, GLAForCausalLM

    config = GLAConfig(
        hidden_size=256, num_hidden_layers=2, num_heads=4, vocab_size=4096, use_cache=False
    )
    ids = tokens(2, 256, 4096)
    return step(
        GLAForCausalLM(config).to(torch.bfloat16),
        target=512,
        sample={"input_ids": ids, "labels": ids},
        on_cpu="Triton's kernels run on a GPU alone",
        state=2.0,
    )


@workload("transformers")
def trainer() -> Step:
    """transformers' Trainer with accumulation, clipping and bf16, by `tune_trainer`."""
    from transformers import Trainer, TrainingArguments

    from autobatch.integrations.transformers import tune_trainer
    from reports.zoo.entries import GPU

    model = llama()
    data = [{"input_ids": ids, "labels": ids} for ids in tokens(64, 128)]
    arguments = TrainingArguments(output_dir="/tmp/zoo", report_to="none", use_cpu=True)
    trained = Trainer(model=model, args=arguments, train_dataset=data)  # type: ignore[arg-type]
    return Step(
        plan=lambda: tune_trainer(trained, target=64, gpu=GPU),
        model=model,
        on_cpu="the Trainer makes its own optimizer and loss while it is tuned",
        state=2.0,
    )
