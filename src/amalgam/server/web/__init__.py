"""What the pages share: their files as answers, and the modules and styles that both the chat and the dashboard use."""
