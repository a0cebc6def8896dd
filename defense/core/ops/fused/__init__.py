"""Triton kernels: what `reference.py` defines, for inference on a GPU. The only package that imports triton.

    suppress             resid - s * sum over i in S of (1 - gain_i) * f_i * W_dec[i]; a TopK rule takes
        _candidates_kernel   h_i for i in S; the positive ones are listed at their token, and the lengths are counted
        _order_kernel        puts each token's list in rising order; lists the tokens by length, and their z in a row
        _count_kernel        streams the encoder over these and counts the latents outside of S above each candidate
        _subtract_kernel     the difference, for the candidates with fewer than k above them
                         and rules that do not couple latents (relu, jumprelu, batchtopk)
        _threshold_kernel    all of it
    encode_topk          the k largest latents of every token
        _encode_kernel       pre_acts, and the maximum of each group of latents
        _select_kernel       the k groups with the largest maxima, which contain the k largest latents; then these
    sparse_decode        sum of k decoder rows per token

Exactness. Every product is accumulated in float32, of float32 operands in float32 ("ieee": tf32 would change which
latents are among the k largest). A candidate's own value was computed in another tile than the one that it is counted
against, and may differ in its last bit. So the stream holds no latent of S: their bias in it is -inf. Candidates are
compared with each other by the values that they are listed with, and only the others are counted. All latents tied at
rank k are kept, as in the reference. Unlike the reference, nothing is rounded to half precision before it is compared,
so the two may differ on latents that are tied within the rounding of that dtype.

Memory. A TopK rule holds 12 bytes per token and latent of S, for so many pictures at a time that they stay below 192
MiB, and z of the tokens; a tile of the encoder is counted in registers and dropped. The number of listed tokens stays
on the device: `_count_kernel` is launched with a fixed number of programs, each of which takes every so many-th tile of
the work that there is.

Time. Counting costs two instructions per candidate and element of a tile. As candidates come in rising order, a tile
is done at the first that no latent in it exceeds. A candidate with k above it is out, and so are those below it: each
token remembers the first slot of its list that may be in, where later tiles begin. A tile goes on as long as one of its
tokens does, so neighbors have lists of about the same length, the longest first. A token stays to the end even where
all its candidates are decided before: a tile could be left out only where that holds for all of its tokens.

Tried, and not kept, as no GPU could tell. Columns by how often their latents fire: on the text defense it spares a
third of the candidates that are looked at, but only where that is known from data (weights alone spare a fifth, and
nothing on other defenses), and it takes a copy of the encoder. Tensor descriptors (TMA) with four stages: on sm_90 a
step along d_model takes 84 instructions for 116, all else more of them, and sizes that are no multiple of 16 bytes
would need the pointers besides; the model of `benchmarks/kernel_static.py` is bound by neither.

NaN and infinity. A token that holds either stays without a finite result, as in the reference; other tokens, and
positions outside of the scope, are what they would be without it.
"""

from .decode import sparse_decode
from .encode import MAX_SELECT, encode_topk, group_size, n_selected_among
from .launching import Tile, launches, obstacle
from .suppression import suppress

__all__ = [
    "MAX_SELECT",
    "Tile",
    "encode_topk",
    "group_size",
    "launches",
    "n_selected_among",
    "obstacle",
    "sparse_decode",
    "suppress",
]
