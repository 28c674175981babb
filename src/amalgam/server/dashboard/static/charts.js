// Lines and bars by plotly.js, which comes with the server and is loaded once the page stands.
// Only our own words and figures go in: plotly reads its texts as a kind of HTML.

import { css } from "./theme.js";

let loading = null;

function plotly() {
  loading ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = new URL("./plotly.min.js", import.meta.url);
    script.onload = () => resolve(window.Plotly);
    script.onerror = () => reject(new Error("plotly.min.js"));
    document.head.append(script);
  });
  return loading;
}

const CONFIG = { displayModeBar: false, responsive: true, displaylogo: false };

export async function chart(node, traces, layout = {}) {
  const library = await plotly();
  const axis = {
    gridcolor: css("--grid"), linecolor: css("--line"), zerolinecolor: css("--grid"), tickcolor: css("--line"),
    automargin: false, fixedrange: true,
  };
  const merged = {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: css("--font"), size: 11, color: css("--muted") },
    margin: { l: 40, r: 12, t: 8, b: 28 },
    showlegend: true,
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 11, color: css("--text") }, bgcolor: "rgba(0,0,0,0)" },
    hovermode: "x unified",
    hoverlabel: { bgcolor: css("--panel"), bordercolor: css("--line"), font: { color: css("--text"), size: 11 } },
    dragmode: false,
    ...layout,
    xaxis: { ...axis, ...layout.xaxis },
    yaxis: { ...axis, ...layout.yaxis },
  };
  if (layout.yaxis2) merged.yaxis2 = { ...axis, ...layout.yaxis2 };
  await library.react(node, traces, merged, CONFIG);
  node.dataset.drawn = "true";
}
