"""The published words: what the summarising model is told, and what the trained model is asked.

Source: data_generation/chatgpt.py; the question is demo.py's, with the space on either side that the tokens have.
"""

from __future__ import annotations

from bestiary.description.merging import Levels, in_words

QUESTION = " Generate the detailed caption in English: "

_ROLE = (
    "I want you to act as an intelligent image captioner. You should generate a descriptive, coherent and logical "
    "description of the image based on the given descriptions from different people for the same image. The position "
    "is represented by normalized top-left and bottom-right coordinates.\n "
)
_RULES = (
    "There are some rules for your response: Provide context of the image. \n "
    "Merging the descriptions of the same object at the same position and the texts belonging to the same sentence. \n "
    "Show main objects with their attributes (e.g. position, color, shape). \n "
    "Show relative position between main objects. \n "
    "Less than 6 sentences. \n "
    "Do not show any numbers or coordinates. \n "
    "Do not describe any individual letter."
)


def summary_prompt(levels: Levels) -> str:
    """The one user message that asks for the detailed caption; without texts their line is left out."""
    texts = f"Texts in the image: {in_words(levels.texts)}\n " if levels.texts else ""
    return (
        f"{_ROLE}Overall Image Caption: {levels.caption}\n "
        f"Dense Caption1 (Region Description: Area Location): {in_words(levels.regions)}\n "
        f"Dense Caption2 (Region Description: Area Location): {in_words(levels.segments)}\n "
        f"{texts}{_RULES}"
    )
