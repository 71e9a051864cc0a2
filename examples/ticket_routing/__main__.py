"""``python -m examples.ticket_routing``."""

from examples.ticket_routing.command import main

main()
