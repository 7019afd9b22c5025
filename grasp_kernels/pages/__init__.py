"""A report in Markdown and its figures -> one HTML page that needs nothing else.

markdown.py  tables of tokens and answers
chart.py     lines as an SVG
page.py      the page
page.css     light and dark, wide and narrow
"""
