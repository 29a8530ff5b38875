"use strict";
(() => {
  /* pixels across a figure on paper, which the style sheet makes smaller */
  const printed = (plot) => (plot.closest(".beside") ? 560 : 1000);
  const config = { displaylogo: false, responsive: true, displayModeBar: false };
  const plots = [...document.querySelectorAll(".plot")];
  const live = document.getElementById("live");
  const unpack = (id) => {
    const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (c) => c.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  };
  let drawings = null;
  let printing = false;
  let tables = 0;

  /* tables and figures that are wider than the screen can be scrolled by key */
  const reachable = () => {
    for (const area of document.querySelectorAll(".scroll, pre")) {
      const wide = area.scrollWidth > area.clientWidth + 1;
      if (wide) area.setAttribute("tabindex", "0"); else area.removeAttribute("tabindex");
      if (wide && !area.hasAttribute("role")) {
        area.setAttribute("role", "region");
        area.setAttribute("aria-label", `Scrolls sideways: ${area.dataset.name || `table ${++tables}`}`);
      }
    }
  };

  const draw = (plot) => {
    if (plot.dataset.drawn || !drawings) return null;
    plot.dataset.drawn = "yes";
    const { data, layout } = drawings[plot.dataset.figure - 1];
    if (printing) layout.width = printed(plot);
    return Plotly.newPlot(plot, data, layout, config);
  };

  /* the points of a figure that say something, in the order in which they are drawn */
  const pointsOf = (plot) => plot._fullData.flatMap((trace, curveNumber) => {
    if (trace.hoverinfo === "skip" || trace.visible !== true) return [];
    const subplot = (trace.xaxis || "x") + (trace.yaxis || "y");
    if (trace.type === "heatmap") {
      return trace.z.flatMap((row, r) => Array.from(row, (z, c) => (z == null ? null : { curveNumber, pointNumber: [r, c], subplot })).filter(Boolean));
    }
    const across = trace.x || [];
    return Array.from(across, (x, pointNumber) => (x == null || trace.y[pointNumber] == null ? null : { curveNumber, pointNumber, subplot })).filter(Boolean);
  });

  const walk = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    const plot = event.currentTarget;
    if (event.key === "Escape") return Plotly.Fx.unhover(plot);
    if (step === undefined || !plot._fullData) return;
    event.preventDefault();
    const points = pointsOf(plot);
    if (!points.length) return;
    const last = plot.dataset.at === undefined ? (step > 0 ? -1 : points.length) : Number(plot.dataset.at);
    const at = Math.min(points.length - 1, Math.max(0, last + step));
    plot.dataset.at = at;
    const { subplot, ...point } = points[at];
    Plotly.Fx.hover(plot, [point], [subplot]);
    setTimeout(() => { // plotly shows a label so many milliseconds after the last one
      const lines = [...plot.querySelectorAll(".hoverlayer text tspan.line, .hoverlayer text:not(:has(tspan.line))")];
      live.textContent = lines.map((line) => line.textContent).join(", ");
    }, 120);
  };

  const paper = (on) => {
    printing = on;
    for (const plot of plots) {
      draw(plot);
      if (plot._fullLayout) Plotly.relayout(plot, on ? { width: printed(plot), autosize: false } : { width: null, autosize: true });
    }
  };

  const start = async () => {
    reachable();
    addEventListener("resize", reachable);
    for (const details of document.querySelectorAll("details")) details.addEventListener("toggle", reachable);
    addEventListener("beforeprint", () => paper(true));
    addEventListener("afterprint", () => paper(false));
    if (!plots.length) return;
    if (!window.DecompressionStream) {
      for (const plot of plots) plot.textContent = "Figures need a browser of 2023 or later; all numbers are in the tables.";
      return;
    }
    const [plotly, drawn] = await Promise.all([unpack("plotly"), unpack("drawn")]);
    const script = document.createElement("script");
    script.textContent = plotly;
    document.head.append(script);
    drawings = JSON.parse(drawn);
    for (const plot of plots) {
      plot.addEventListener("keydown", walk);
      await draw(plot);
      await new Promise((next) => setTimeout(next));
    }
    reachable();
    document.documentElement.dataset.ready = "yes";
  };
  start();
})();
