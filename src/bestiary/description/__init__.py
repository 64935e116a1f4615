"""Descriptions of a picture on several levels: global, regions, segments, texts, and their summary (Monkey's data).

Source: Monkey's data_generation scripts.
"""
