// Draws each figure when it comes into view: the text of its element is its JSON.
const config = {
  displaylogo: false,
  responsive: true,
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]], // no others: one of them uploads
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
