"""What a person reads of a run: a page (``html``) and two panels in the terminal (``terminal``)."""
