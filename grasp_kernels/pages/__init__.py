"""A report in Markdown and its figures -> one HTML page in a single file.

markdown.py  tables of tokens and answers
chart.py     lines as an SVG
page.py      the page
page.css     light and dark, wide and narrow
"""
