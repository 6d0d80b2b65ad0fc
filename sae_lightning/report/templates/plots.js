// Draws each figure when it scrolls into view, from the JSON in its element.
const config = {
  displaylogo: false,
  responsive: true,
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]], // leaves out a button that uploads the figure
};
const seen = new IntersectionObserver(entries => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    seen.unobserve(target);
    const { data, layout } = JSON.parse(target.firstElementChild.textContent);
    target.replaceChildren();
    Plotly.newPlot(target, data, layout, config);
  }
}, { rootMargin: "200px" });
document.querySelectorAll(".plot").forEach(plot => seen.observe(plot));
