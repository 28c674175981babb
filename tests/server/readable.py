"""Texts of a page whose contrast to their ground is too low: scripts to run in it."""

from __future__ import annotations

CONTRAST = """
    const paint = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    const known = new Map();
    const rgb = (color) => {
        paint.clearRect(0, 0, 1, 1);
        paint.fillStyle = color;
        paint.fillRect(0, 0, 1, 1);
        return [...paint.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const luminance = (color) => {
        if (!known.has(color)) {
            const linear = (value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
            const [r, g, b] = rgb(color).map((value) => linear(value / 255));
            known.set(color, 0.2126 * r + 0.7152 * g + 0.0722 * b);
        }
        return known.get(color);
    };
    const contrast = (one, other) => {
        const [high, low] = [luminance(one), luminance(other)].sort((a, b) => b - a);
        return (high + 0.05) / (low + 0.05);
    };
"""
UNREADABLE = f"""
    {CONTRAST}
    const background = (node) => {{
        for (; node; node = node.parentElement) {{
            const style = getComputedStyle(node);
            if (node.classList.contains("route")) return style.getPropertyValue("--color");
            if (!/^rgba\\(.*, 0\\)$/.test(style.backgroundColor)) return style.backgroundColor;
        }}
    }};
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const [found, seen] = [[], new Set()];
    while (texts.nextNode()) {{
        const node = texts.currentNode.parentElement;
        if (seen.has(node) || !texts.currentNode.data.trim() || !node.checkVisibility()) continue;
        seen.add(node);
        if (node.closest("svg, script, noscript, :disabled")) continue;
        const ratio = contrast(getComputedStyle(node).color, background(node));
        const text = texts.currentNode.data.slice(0, 20);
        if (ratio < 4.5) found.push(`${{node.className || node.tagName}} "${{text}}": ${{ratio.toFixed(2)}}`);
    }}
    for (const node of document.querySelectorAll("[placeholder]:placeholder-shown")) {{
        if (node.disabled || !node.checkVisibility()) continue;
        const {{ color, opacity }} = getComputedStyle(node, "::placeholder");
        const ratio = contrast(color, background(node));
        if (ratio < 4.5 || opacity < 1) found.push(`placeholder "${{node.placeholder}}": ${{ratio.toFixed(2)}}`);
    }}
    return [...new Set(found)];
"""
