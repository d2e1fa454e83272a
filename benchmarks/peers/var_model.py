"""VAR's transformer in eager PyTorch: attributes, state dict, arguments and results of its class `VAR`.

It samples as the published model does: the KV cache grows by concatenation, the batch is doubled for guidance
whether or not there is any, and each block runs its AdaLN linear again at each scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.var_autoencoder import VQVAE


class SelfAttention(nn.Module):
    """Attention whose keys have no bias, with or without normalised queries and keys."""

    def __init__(self, width: int, heads: int, l2_norm: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_l2_norm = heads, width // heads, l2_norm
        self.scale = 1.0 if l2_norm else 0.25 / math.sqrt(self.head_dim)
        if l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4.0)))
            self.max_scale_mul = math.log(100.0)
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = nn.Linear(width, width)
        self.kv_caching(False)

    def kv_caching(self, enable: bool) -> None:
        """Begin with an empty cache, or do without one."""
        self.caching = enable
        self.cached_k: Tensor | None = None
        self.cached_v: Tensor | None = None

    def forward(self, x: Tensor, attn_bias: Tensor | None) -> Tensor:
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv = F.linear(x, self.mat_qkv.weight, bias).unflatten(2, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.attn_l2_norm:
            q = F.normalize(q, dim=-1).mul(self.scale_mul_1H11.clamp_max(self.max_scale_mul).exp())
            k = F.normalize(k, dim=-1)
        if self.caching:
            if self.cached_k is not None and self.cached_v is not None:
                k, v = torch.cat((self.cached_k, k), dim=2), torch.cat((self.cached_v, v), dim=2)
            self.cached_k, self.cached_v = k, v
        q, k = q.to(v.dtype), k.to(v.dtype)  # normalising leaves a 16-bit autocast in float32
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias, scale=self.scale)
        return self.proj(out.transpose(1, 2).flatten(2))


class FFN(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class DropPath(nn.Module):
    """In training, drops a branch of whole images."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.drop_prob = share

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        kept = x.new_empty(len(x), 1, 1).bernoulli_(1 - self.drop_prob)
        return x * kept / (1 - self.drop_prob)


class AdaLNSelfAttn(nn.Module):
    """A block; its six modulations come from a linear of its own, or from a shared one plus an offset."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        shared: bool,
        l2_norm: bool,
        drop_path: float,
        eps: float,
    ) -> None:
        super().__init__()
        self.C, self.shared_aln = width, shared
        self.drop_path = DropPath(drop_path)
        self.attn = SelfAttention(width, heads, l2_norm)
        self.ffn = FFN(width, round(width * mlp_ratio))
        self.ln_wo_grad = nn.LayerNorm(width, eps=eps, elementwise_affine=False)
        if shared:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5)
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, cond_BD: Tensor, attn_bias: Tensor | None) -> Tensor:
        """`cond_BD` is `(B, C)`, or of a shared linear `(B, 1, 6, C)`."""
        rows = self.ada_gss + cond_BD if self.shared_aln else self.ada_lin(cond_BD).view(-1, 1, 6, self.C)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = rows.unbind(2)
        normed = self.ln_wo_grad(x).mul(scale1 + 1).add_(shift1)
        x = x + self.drop_path(self.attn(normed, attn_bias).mul(gamma1))
        normed = self.ln_wo_grad(x).mul(scale2 + 1).add_(shift2)
        return x + self.drop_path(self.ffn(normed).mul(gamma2))


class AdaLNBeforeHead(nn.Module):
    """The modulated norm before the classifier."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.C = width
        self.ln_wo_grad = nn.LayerNorm(width, eps=eps, elementwise_affine=False)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, cond_BD: Tensor) -> Tensor:
        scale, shift = self.ada_lin(cond_BD).view(-1, 1, 2, self.C).unbind(2)
        return self.ln_wo_grad(x).mul(scale + 1).add_(shift)


class SharedAdaLin(nn.Linear):
    """The one linear of all blocks: `(B, 1, 6, C)`."""

    def forward(self, cond_BD: Tensor) -> Tensor:
        return super().forward(cond_BD).view(-1, 1, 6, self.out_features // 6)


class VAR(nn.Module):
    """Next-scale prediction of class-conditional images (arXiv 2404.02905).

    Args:
        vae_local: the tokenizer; no submodule, as in the published class.
        num_classes: one more stands for none.
        depth, embed_dim, num_heads, mlp_ratio: sizes; VAR-dN has N, 64 N and N.
        drop_path_rate: of the last block.
        norm_eps: of the layer norms.
        shared_aln: one AdaLN linear for all blocks, as in VAR-d36.
        cond_drop_rate: share of labels that training drops.
        attn_l2_norm: normalise queries and keys.
        patch_nums: sides of the scales.
    """

    lvl_1L: Tensor  # noqa: N815
    attn_bias_for_masking: Tensor

    def __init__(
        self,
        vae_local: VQVAE,
        num_classes: int = 1000,
        depth: int = 16,
        embed_dim: int = 1024,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        shared_aln: bool = False,
        cond_drop_rate: float = 0.1,
        attn_l2_norm: bool = True,
        patch_nums: Sequence[int] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    ) -> None:
        super().__init__()
        self.Cvae, self.V = vae_local.Cvae, vae_local.vocab_size
        self.depth, self.C, self.D, self.num_heads = depth, embed_dim, embed_dim, num_heads
        self.cond_drop_rate, self.drop_path_rate, self.prog_si = cond_drop_rate, drop_path_rate, -1
        self.patch_nums = tuple(patch_nums)
        lengths = [side * side for side in patch_nums]
        self.L, self.first_l = sum(lengths), lengths[0]
        ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
        self.begin_ends = [(end - length, end) for end, length in zip(ends, lengths, strict=True)]
        self.num_stages_minus_1 = len(patch_nums) - 1
        self.rng = torch.Generator(device=next(vae_local.parameters()).device)
        self.vae_proxy = (vae_local,)
        self.vae_quant_proxy = (vae_local.quantize,)
        self.word_embed = nn.Linear(self.Cvae, embed_dim)
        self.num_classes = num_classes
        self.uniform_prob = torch.full((1, num_classes), 1.0 / num_classes)
        self.class_emb = nn.Embedding(num_classes + 1, embed_dim)
        self.pos_start = nn.Parameter(torch.empty(1, self.first_l, embed_dim))
        self.pos_1LC = nn.Parameter(torch.empty(1, self.L, embed_dim))
        self.lvl_embed = nn.Embedding(len(patch_nums), embed_dim)
        shared = nn.Sequential(nn.SiLU(), SharedAdaLin(embed_dim, 6 * embed_dim))
        self.shared_ada_lin = shared if shared_aln else nn.Identity()
        drops = torch.linspace(0, drop_path_rate, depth).tolist()
        self.blocks = nn.ModuleList(
            AdaLNSelfAttn(embed_dim, num_heads, mlp_ratio, shared_aln, attn_l2_norm, drop, norm_eps)
            for drop in drops
        )
        level = torch.repeat_interleave(torch.tensor(lengths))[None]
        self.register_buffer("lvl_1L", level)
        mask = torch.where(level[0][:, None] >= level, 0.0, -torch.inf)
        self.register_buffer("attn_bias_for_masking", mask[None, None])
        self.head_nm = AdaLNBeforeHead(embed_dim, norm_eps)
        self.head = nn.Linear(embed_dim, self.V)
        self.init_weights()

    @torch.no_grad()
    def init_weights(
        self, init_adaln: float = 0.5, init_adaln_gamma: float = 1e-5, init_head: float = 0.02
    ) -> None:
        """As VAR begins its training."""
        std = math.sqrt(1 / self.C / 3)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_start, std=std)
        nn.init.trunc_normal_(self.pos_1LC, std=std)
        self.head.weight.mul_(init_head)
        self.head_nm.ada_lin[1].weight.mul_(init_adaln)
        for block in self.blocks:
            for linear in (block.attn.proj, block.ffn.fc2):
                linear.weight.div_(math.sqrt(2 * self.depth))
            rows = (
                block.ada_gss[0, 0] if block.shared_aln else block.ada_lin[1].weight.view(6, self.C, self.C)
            )
            rows[2:].mul_(init_adaln)
            rows[:2].mul_(init_adaln_gamma)

    def get_logits(self, h: Tensor, cond_BD: Tensor) -> Tensor:
        """`(B, L, V)` float32."""
        return self.head(self.head_nm(h.float(), cond_BD).float()).float()

    @torch.no_grad()
    def autoregressive_infer_cfg(
        self,
        B: int,
        label_B: int | Tensor | None,
        g_seed: int | None = None,
        cfg: float = 1.5,
        top_k: int = 0,
        top_p: float = 0.0,
        more_smooth: bool = False,
    ) -> Tensor:
        """VAR's own sampler: images `(B, 3, H, W)` in [0, 1]; `cfg` is that of the last scale."""
        rng = None if g_seed is None else self.rng.manual_seed(g_seed)
        if label_B is None:
            label_B = torch.multinomial(self.uniform_prob, B, replacement=True, generator=rng).reshape(B)
        elif isinstance(label_B, int):
            known = self.num_classes if label_B < 0 else label_B
            label_B = torch.full((B,), known, device=self.lvl_1L.device)
        free = torch.full_like(label_B, self.num_classes)
        condition = self.class_emb(torch.cat((label_B, free)))
        modulation = self.shared_ada_lin(condition)
        places = self.lvl_embed(self.lvl_1L) + self.pos_1LC
        rows = condition[:, None] + self.pos_start + places[:, : self.first_l]
        f_hat = condition.new_zeros(B, self.Cvae, self.patch_nums[-1], self.patch_nums[-1])
        vae, quantizer = self.vae_proxy[0], self.vae_quant_proxy[0]
        for block in self.blocks:
            block.attn.kv_caching(True)
        for scale, side in enumerate(self.patch_nums):
            for block in self.blocks:
                rows = block(x=rows, cond_BD=modulation, attn_bias=None)
            logits = self.get_logits(rows, condition)
            ratio = scale / self.num_stages_minus_1
            logits = (1 + cfg * ratio) * logits[:B] - cfg * ratio * logits[B:]
            indices = sample(logits, top_k, top_p, rng)
            if more_smooth:
                tau = max(0.27 * (1 - ratio * 0.95), 0.005)
                h = gumbel_softmax(logits * (1 + ratio), tau, rng) @ quantizer.embedding.weight
            else:
                h = quantizer.embedding(indices)
            h = h.transpose(1, 2).reshape(B, self.Cvae, side, side)
            f_hat, following = quantizer.get_next_autoregressive_input(scale, len(self.patch_nums), f_hat, h)
            if scale < self.num_stages_minus_1:
                begin, end = self.begin_ends[scale + 1]
                rows = self.word_embed(following.flatten(2).transpose(1, 2)) + places[:, begin:end]
                rows = rows.repeat(2, 1, 1)
        for block in self.blocks:
            block.attn.kv_caching(False)
        return vae.fhat_to_img(f_hat).add_(1).mul_(0.5)

    def forward(self, label_B: Tensor, x_BLCv_wo_first_l: Tensor) -> Tensor:
        """Logits `(B, L, V)` under teacher forcing, of labels `(B,)` and inputs `(B, L - first_l, Cvae)`."""
        dropped = torch.rand(len(label_B), device=label_B.device) < self.cond_drop_rate
        condition = self.class_emb(torch.where(dropped, self.num_classes, label_B))
        start = condition[:, None] + self.pos_start
        x = torch.cat((start, self.word_embed(x_BLCv_wo_first_l.float())), dim=1)
        x = x + self.lvl_embed(self.lvl_1L) + self.pos_1LC
        modulation = self.shared_ada_lin(condition)
        for block in self.blocks:
            x = block(x, modulation, self.attn_bias_for_masking)
        return self.get_logits(x, condition)


def sample(logits: Tensor, top_k: int, top_p: float, rng: torch.Generator | None) -> Tensor:
    """Codes `(B, L)` of logits `(B, L, V)`, which are left filtered."""
    if top_k > 0:
        least = logits.topk(top_k, dim=-1).values.amin(dim=-1, keepdim=True)
        logits.masked_fill_(logits < least, -torch.inf)
    if top_p > 0:
        ascending, order = logits.sort(dim=-1)
        goes = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        goes[..., -1] = False
        logits.masked_fill_(goes.scatter(-1, order, goes), -torch.inf)
    drawn = torch.multinomial(logits.softmax(dim=-1).flatten(0, 1), 1, replacement=True, generator=rng)
    return drawn.view(logits.shape[:2])


def gumbel_softmax(logits: Tensor, tau: float, rng: torch.Generator | None) -> Tensor:
    """The softmax of logits with Gumbel noise, over a temperature."""
    noise = -torch.empty_like(logits).exponential_(generator=rng).log()
    return ((logits + noise) / tau).softmax(dim=-1)
