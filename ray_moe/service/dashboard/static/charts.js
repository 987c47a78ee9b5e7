// Lines over time, drawn by plotly where the service has it (`ray-moe[dashboard]`).

const SCRIPT = "dashboard/static/plotly.min.js";
const CONFIG = { displayModeBar: false, responsive: true, displaylogo: false, scrollZoom: false, doubleClick: false };

function style(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** Resolves when plotly is there; rejects where it is not installed. */
function library() {
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = SCRIPT;
    script.onload = () => (window.Plotly ? resolve(window.Plotly) : reject(new Error("plotly did not start")));
    script.onerror = () => reject(new Error("plotly is not installed"));
    document.head.append(script);
  });
}

const CHARTS = [
  { id: "chart-tokens", lines: [{ name: "tokens/s", of: (point) => point.tokens }], format: ".3~s" },
  { id: "chart-balance", lines: [{ name: "balancedness", of: (point) => point.balance }], range: [0, 1.05], format: ".2f" },
  { id: "chart-first", lines: ["p50", "p95"].map((name, i) => ({ name, of: (point) => point.first[i] })), format: ".3~s" },
  { id: "chart-gap", lines: ["p50", "p95"].map((name, i) => ({ name, of: (point) => point.gap[i] })), format: ".3~s" },
];

export class Charts {
  async start() {
    this.plotly = await library();
  }

  /** Draw all of them anew; nothing without plotly. */
  draw(points) {
    if (!this.plotly || !points.length) return;
    this.points = points;
    const last = points[points.length - 1].time;
    const first = new Date(Math.min(points[0].time.getTime(), last.getTime() - 60_000));
    for (const chart of CHARTS) this._draw(chart, points, [first, last]);
  }

  _draw(chart, points, span) {
    const colours = [style("--accent"), style("--second")];
    const x = points.map((point) => point.time);
    const traces = chart.lines.map((line, i) => ({
      type: "scatter",
      mode: "lines",
      name: line.name,
      x,
      y: points.map(line.of),
      line: { color: colours[i], width: 1.8 },
      fill: chart.lines.length === 1 ? "tozeroy" : "none",
      fillcolor: `${colours[i]}22`,
      hovertemplate: `%{y:${chart.format}}<extra>${line.name}</extra>`,
    }));
    const axis = { gridcolor: style("--line"), zeroline: false, fixedrange: true, color: style("--muted"), tickfont: { size: 11 }, ticks: "outside", ticklen: 5, tickcolor: "rgba(0,0,0,0)" };
    const layout = {
      margin: { l: 40, r: 8, t: 8, b: 24 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", color: style("--text"), size: 11 },
      showlegend: chart.lines.length > 1,
      legend: { orientation: "h", x: 1, xanchor: "right", y: 1.02, yanchor: "bottom", font: { size: 11 } },
      hovermode: "x unified",
      hoverlabel: { bgcolor: style("--card"), bordercolor: style("--line"), font: { color: style("--text") } },
      xaxis: { ...axis, type: "date", range: span, tickformat: "%H:%M:%S", hoverformat: "%H:%M:%S", nticks: 4, showgrid: false },
      yaxis: { ...axis, range: chart.range ?? null, rangemode: "tozero", nticks: 4, tickformat: chart.format },
    };
    if (chart.lines.length > 1) layout.margin.t = 20;
    this.plotly.react(chart.id, traces, layout, CONFIG);
  }
}
