"""A support desk: tickets come in as a live stream and go to one of twelve departments.

``python -m examples.ticket_routing``, from the top of a clone; README.md shows what it prints.
"""
