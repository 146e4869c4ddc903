"""Names of the slots that stalign reads and writes; each name stands here once."""

from __future__ import annotations

from typing import Final


class Key:
    """Slot names, grouped by the attribute of the AnnData that holds them."""

    UNS: Final = "stalign"

    class obsm:
        SPATIAL: Final = "spatial"
        EMBEDDING: Final = "X_stalign"
        ANNOTATION_SCORE: Final = "stalign_annotation_score"
        PREDICTED: Final = "stalign_predicted"
        PREDICTED_SD: Final = "stalign_predicted_sd"
        PREDICTED_LOWER: Final = "stalign_predicted_lower"
        PREDICTED_UPPER: Final = "stalign_predicted_upper"

    class obs:
        ARRAY_ROW: Final = "array_row"
        ARRAY_COL: Final = "array_col"
        DOMAIN: Final = "stalign_domain"
        ANNOTATION: Final = "stalign_annotation"
        ANNOTATION_CONFIDENCE: Final = "stalign_annotation_confidence"

    class var:
        GENE: Final = "stalign_gene"
        PREDICTED_R: Final = "stalign_predicted_r"

    class layers:
        PREDICTED: Final = "stalign_predicted"

    class uns:
        SPATIAL: Final = "spatial"
        NICHE: Final = "niche"
        GENES: Final = "genes"
        EMBED: Final = "embed"
        JOB: Final = "job"
        DOMAINS: Final = "domains"
        ANNOTATION: Final = "annotation"
        PREDICTION: Final = "prediction"
        QUALITY: Final = "quality"
        CALIBRATION: Final = "calibration"

    NICHE: Final = "niche"
    QUALITY: Final = "stalign"

    @staticmethod
    def quality(what: str, key_added: str = "stalign") -> str:
        """``obs`` name of one result of :func:`stalign.tl.quality`."""
        return f"{key_added}_{what}"

    @staticmethod
    def connectivities(key_added: str = "niche") -> str:
        """``obsp`` name of the niche graph."""
        return f"{key_added}_connectivities"

    @staticmethod
    def niche_n_spots(key_added: str = "niche") -> str:
        """``obs`` name of the number of spots in a niche."""
        return f"{key_added}_n_spots"

    @staticmethod
    def niche_in_image(key_added: str = "niche") -> str:
        """``obs`` name of the share of the niche patch that lies inside the image."""
        return f"{key_added}_in_image"

    @staticmethod
    def embedding(part: str, key_added: str = "X_stalign") -> str:
        """``obsm`` name of one output of :func:`stalign.tl.embed`; ``"fused"`` has no suffix."""
        return key_added if part == "fused" else f"{key_added}_{part}"

    @staticmethod
    def embed_record(key_added: str = "X_stalign") -> str:
        """Name in ``uns["stalign"]`` of what is recorded about an embedding; each ``key_added`` has its own."""
        return "embed" if key_added == "X_stalign" else f"embed_{key_added}"
