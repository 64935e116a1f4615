"""Talking to a trained model: `Session`, what it is asked (`Request`, marks) and how it answers (`Settings`)."""

from bestiary.inference.pictures import Mark, box, point, stroke
from bestiary.inference.session import PUBLISHED, Chat, Request, Session, Settings

__all__ = ["PUBLISHED", "Chat", "Mark", "Request", "Session", "Settings", "box", "point", "stroke"]
