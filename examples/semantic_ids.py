"""Semantic IDs of items: residual k-means on embeddings, plain and balanced, and what equal prefixes mean.

The items are the 1797 handwritten digits that come with scikit-learn, the embeddings their 24 first principal
components, and the labels, which k-means never sees, stand for what a recommender would call categories.

    pip install 'vqops[examples]' && python examples/semantic_ids.py
"""

import argparse
from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from torch import Tensor

import vqops


def embeddings(items: int, dim: int) -> tuple[Tensor, Tensor]:  # [N, D], [N]
    digits = load_digits()
    pixels, labels = digits.data[:items], digits.target[:items]
    x = PCA(dim, svd_solver="full").fit_transform(pixels)
    return torch.from_numpy(x).float(), torch.from_numpy(labels).long()


def agreement(ids: Tensor, labels: Tensor) -> float:
    """Of the pairs of items with the same ID, the share with the same label; NaN without such a pair."""
    _, group = ids.unique(dim=0, return_inverse=True)
    _, both = torch.stack([group, labels], 1).unique(dim=0, return_counts=True)
    _, size = group.unique(return_counts=True)
    return ((both * (both - 1)).sum() / (size * (size - 1)).sum()).item()


def of_longest_prefix(new: Tensor, ids: Tensor, labels: Tensor) -> Tensor:  # [M, Q], [N, Q], [N] -> [M]
    """A label for each new item: the most common among the items that share the longest prefix with it."""
    found = []
    for row in new:
        shared = (ids == row).cumprod(1).sum(1)
        found.append(labels[shared == shared.max()].mode().values)
    return torch.stack(found)


def report(name: str, x: Tensor, labels: Tensor, sizes: Sequence[int], balanced: bool, seed: int) -> None:
    known = int(len(x) * 0.9)
    ids = vqops.residual_kmeans(x[:known], sizes, balanced=balanced, seed=seed)
    print(f"\n{name}: {known} items, sizes {list(sizes)}")
    print("level  codes used  largest cluster  explained  distinct IDs  collisions  same label")
    for level, K in enumerate(sizes):
        used = round(ids.usage[level].item() * K)
        largest = ids.indices[:, level].bincount().max().item()
        print(
            f"{level + 1:5}  {used:4} of {K:3}  {largest:15}  {ids.variance_explained[level]:9.1%}"
            f"  {ids.num_unique[level]:12}  {ids.collision_rate[level]:10.1%}"
            f"  {agreement(ids.indices[:, : level + 1], labels[:known]):10.1%}"
        )
    whole = vqops.unique_ids(ids.indices)
    assert len(whole.unique(dim=0)) == known
    print(f"A position more, of {whole[:, -1].max() + 1} values, makes all IDs unique.")

    new = ids.encode(x[known:])
    right = of_longest_prefix(new, ids.indices, labels[:known]) == labels[known:]
    print(f"{right.double().mean():.1%} of {len(new)} new items have the label of those that share the longest prefix.")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Semantic IDs of scikit-learn's digits")
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 16, 16], help="codes of each level")
    parser.add_argument("--items", type=int, default=1797)
    parser.add_argument("--dim", type=int, default=24, help="principal components")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    x, labels = embeddings(options.items, options.dim)
    x, labels = (t[torch.randperm(len(x), generator=torch.Generator().manual_seed(options.seed))] for t in (x, labels))
    chance = agreement(torch.zeros(len(labels), 1), labels)
    print(f"Two items have the same label with probability {chance:.1%}.")
    for name, balanced in (("plain", False), ("balanced", True)):
        report(name, x, labels, options.sizes, balanced, options.seed)


if __name__ == "__main__":
    main()
