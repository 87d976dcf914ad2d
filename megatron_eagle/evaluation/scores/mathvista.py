"""MathVista without a judge: options, whole numbers and decimals that stand alone in the answer.

Rule: VLMEvalKit's ``vlmeval/dataset/utils/mathvista.py`` (``post_check``). It asks a judge to extract the number from
any answer that is not right as it stands; here a lone number is what would be extracted from it, and the rest is None.
A list, which the official code never counts as right, is right in the reference's very words.
"""

from collections.abc import Mapping

from megatron_eagle.evaluation.scores.multiple_choice import chosen_option


def mathvista(answer: str, reference: str, answer_type: str, options: Mapping[str, str]) -> bool | None:
    """Whether ``answer`` is right, None if only a judge can tell.

    reference: the option's letter if there are ``options``, else a value of ``answer_type`` ("integer", "float", "list"
    or "text").
    """
    if options:
        chosen = chosen_option(answer, options)
        return None if chosen is None else chosen == reference
    try:
        if answer_type == "integer":
            return int(answer) == int(reference)
        if answer_type == "float":
            return float(answer) == float(reference)
    except ValueError:
        return None
    return True if answer == reference else None
