"""A report in Markdown and its figures -> one HTML page that needs nothing else.

page.py      the page
figure.py    a figure as PNG for the Markdown, and as SVG for the page
page.css     light and dark, wide and narrow
"""

from grasp_kernels.pages.figure import drawing, save_figure
from grasp_kernels.pages.page import page

__all__ = ["drawing", "page", "save_figure"]
