"""What a trained dictionary must beat: a random dictionary of its size, and the k best linear directions."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pipeline.dictionary.model import TopKDictionary

SAMPLE_ROWS = 65_536


@torch.no_grad()
def fit(
    sample_ND: torch.Tensor, features: int, k: int, seed: int, target_NE: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Both baselines, from a sample of the training stream.

    The random dictionary is the one that training starts from: random unit directions, the data's mean,
    and an encoder scaled to the least squared error, so it is as good as a random one gets. With a target, what follows
    principal components is the linear map with the least squared error.

    Args:
        sample_ND: Activations; the first 65,536 rows are used.
        features: F of the random dictionary.
        k: Its active features, and the number of principal components.
        seed: Of the random directions.
        target_NE: What a transcoder explains, of the same tokens.

    Returns:
        Tensors by name.
    """
    sample_ND = sample_ND[:SAMPLE_ROWS].float()
    if target_NE is not None:
        target_NE = target_NE[:SAMPLE_ROWS].float()
    random = TopKDictionary(
        sample_ND.shape[1], features, k, target_width=None if target_NE is None else target_NE.shape[1]
    )
    random.initialize(sample_ND, seed + 1, y_ND=target_NE)
    mean_D = sample_ND.double().mean(0)
    centred_ND = sample_ND.double() - mean_D
    _, vectors_DD = torch.linalg.eigh(centred_ND.T @ centred_ND)
    # eigh sorts ascending; a sign is fixed so that the bytes do not depend on the solver's choice.
    components_DK = vectors_DD.flip(1)[:, :k]
    signs_K = torch.where(components_DK.sum(0) < 0, -1.0, 1.0).double()
    components_DK = components_DK * signs_K
    explained_ND = sample_ND if target_NE is None else target_NE
    mean_E = explained_ND.double().mean(0)
    map_KE = components_DK.T
    if target_NE is not None:
        map_KE = torch.linalg.lstsq(centred_ND @ components_DK, explained_ND.double() - mean_E).solution
    return {
        "mean": mean_E.float(),
        "pca.mean": mean_D.float(),
        "pca.components": components_DK.float().contiguous(),
        "pca.map": map_KE.float().contiguous(),
        **{f"random.{name}": value for name, value in random.state_dict().items()},
    }


def reconstructor(name: str, fitted: dict[str, torch.Tensor], k: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A baseline as a function from activations to reconstructions, (N, D) to (N, D), or (N, E) with a target."""
    if name == "pca":
        mean_D, mean_E = fitted["pca.mean"], fitted["mean"]
        components_DK, map_KE = fitted["pca.components"], fitted["pca.map"]

        def project(x_ND: torch.Tensor) -> torch.Tensor:
            return (x_ND - mean_D) @ components_DK @ map_KE + mean_E

        return project
    weights = {key.removeprefix("random."): value for key, value in fitted.items() if key.startswith("random.")}
    target_width = weights["W_dec"].shape[1] if "b_in" in weights else None
    random = TopKDictionary(weights["W_enc"].shape[1], len(weights["W_enc"]), k, target_width=target_width)
    random.load_state_dict(weights)
    random.to(weights["W_dec"].device)

    def reconstruct(x_ND: torch.Tensor) -> torch.Tensor:
        return random.decode(*random.encode(x_ND))

    return reconstruct
