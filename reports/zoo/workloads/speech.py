"""Speech and sound."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reports.zoo.entries import Step, step, workload
from reports.zoo.workloads.parts import tokens


@workload("transformers")
def wav2vec2_ctc() -> Step:
    """wav2vec2 of transformers with CTC on waves."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    config = Wav2Vec2Config(
        hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256,
        conv_dim=(64,) * 7, vocab_size=32, mask_time_prob=0.0, layerdrop=0.0, hidden_dropout=0.0,
        activation_dropout=0.0, attention_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0,
        attn_implementation="eager", num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    sample = {"input_values": torch.randn(2, 16000), "labels": tokens(2, 20, 32)}
    return step(Wav2Vec2ForCTC(config), target=256, sample=sample)


@workload("transformers")
def whisper_of_transformers() -> Step:
    """Whisper of transformers on a T4."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        d_model=128, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=256, decoder_ffn_dim=256, vocab_size=1024,
        max_source_positions=150, dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, attn_implementation="eager", use_cache=False,
    )  # fmt: skip
    sample = {"input_features": torch.randn(2, 80, 300), "labels": tokens(2, 24, 1024)}
    return step(WhisperForConditionalGeneration(config), target=64, gpu="t4", sample=sample)


@workload("openai-whisper")
def openai_whisper() -> Step:
    """Whisper of OpenAI, which has a sparse buffer."""
    from whisper.model import ModelDimensions, Whisper

    dims = ModelDimensions(
        n_mels=80, n_audio_ctx=150, n_audio_state=128, n_audio_head=4, n_audio_layer=2,
        n_vocab=1024, n_text_ctx=64, n_text_state=128, n_text_head=4, n_text_layer=2,
    )  # fmt: skip

    def loss(model: nn.Module, batch: Any) -> Tensor:
        mel, ids = batch
        return F.cross_entropy(model(mel, ids[:, :-1]).transpose(1, 2), ids[:, 1:])

    sample = (torch.randn(2, 80, 300), tokens(2, 32, 1024))
    return step(
        Whisper(dims),
        target=256,
        sample=sample,
        loss=loss,
        on_cpu="the CPU's attention kernel keeps other bytes than the GPU's",
        state=2.0,
    )


@workload("speechbrain")
def speaker_embeddings() -> Step:
    """ECAPA-TDNN of SpeechBrain with additive angular margins."""
    from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN, Classifier
    from speechbrain.nnet.losses import AdditiveAngularMargin, LogSoftmaxWrapper

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = ECAPA_TDNN(
                80, lin_neurons=64, channels=[64, 64, 64, 64, 192], attention_channels=32
            )
            self.classify = Classifier(64, out_neurons=100)

        def forward(self, x: Tensor) -> Tensor:
            return self.classify(self.embed(x))  # type: ignore[no-any-return]

    criterion = LogSoftmaxWrapper(AdditiveAngularMargin(margin=0.2, scale=30))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return criterion(model(batch[0]), batch[1][:, None])  # type: ignore[no-any-return]

    sample = (torch.randn(2, 100, 80), torch.randint(100, (2,)))
    return step(Net(), target=512, sample=sample, loss=loss)


@workload("conformer")
def conformer_ctc() -> Step:
    """A Conformer encoder with CTC over padded targets."""
    from conformer import Conformer

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Conformer(
                dim=128, depth=3, dim_head=32, heads=4, ff_mult=2, conv_kernel_size=15
            )
            self.head = nn.Linear(128, 40)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.encoder(x)).log_softmax(-1)  # type: ignore[no-any-return]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, targets, lengths = batch
        full = torch.full((x.shape[0],), x.shape[1], dtype=torch.long, device=x.device)
        return F.ctc_loss(model(x).transpose(0, 1), targets, full, lengths, zero_infinity=True)

    sample = (torch.randn(2, 120, 128), torch.randint(1, 40, (2, 20)), torch.tensor([20, 18]))
    return step(Net(), target=512, sample=sample, loss=loss)


@workload("auraloss")
def spectral_vocoder() -> Step:
    """A weight-normed vocoder with the multi-resolution STFT loss of auraloss."""
    from auraloss.freq import MultiResolutionSTFTLoss
    from torch.nn.utils.parametrizations import weight_norm

    model = nn.Sequential(
        weight_norm(nn.Conv1d(80, 64, 7, padding=3)),
        nn.LeakyReLU(0.1),
        weight_norm(nn.ConvTranspose1d(64, 32, 16, 8, 4)),
        nn.LeakyReLU(0.1),
        weight_norm(nn.ConvTranspose1d(32, 16, 16, 8, 4)),
        nn.LeakyReLU(0.1),
        nn.Conv1d(16, 1, 7, padding=3),
        nn.Tanh(),
    )
    criterion = MultiResolutionSTFTLoss(
        fft_sizes=[512, 1024], hop_sizes=[64, 128], win_lengths=[256, 512]
    )
    sample = (torch.randn(2, 80, 64), torch.randn(2, 1, 4096))
    return step(
        model,
        target=512,
        sample=sample,
        loss=lambda model, batch: criterion(model(batch[0]), batch[1]),
    )


@workload("vector-quantize-pytorch")
def codec() -> Step:
    """A codec with residual vector quantization, whose codebooks follow the data."""
    from vector_quantize_pytorch import ResidualVQ

    class Codec(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Conv1d(1, 64, 16, 8, 4)
            self.quantizer = ResidualVQ(dim=64, codebook_size=256, num_quantizers=2)
            self.decoder = nn.ConvTranspose1d(64, 1, 16, 8, 4)

        def forward(self, wave: Tensor) -> tuple[Tensor, Tensor]:
            quantized, _, commitment = self.quantizer(self.encoder(wave).transpose(1, 2))
            return self.decoder(quantized.transpose(1, 2)), commitment.sum()

    def loss(model: nn.Module, wave: Tensor) -> Tensor:
        out, commitment = model(wave)
        return F.l1_loss(out, wave) + commitment

    return step(
        Codec(),
        target=512,
        sample=torch.randn(4, 1, 4096),
        loss=loss,
        on_cpu=(4, 8),
    )
