"""What a chat model writes → content, reasoning and tool calls, as it comes; a file for each family of formats."""
