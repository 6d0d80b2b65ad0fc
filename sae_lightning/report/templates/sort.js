// Sorts a table's rows by the clicked column: numbers by value, then words; empty cells stay last.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const headings = [...table.querySelectorAll("th")];
  const compare = (a, b) => {
    const [x, y] = [Number(a), Number(b)];
    if (Number.isNaN(x) || Number.isNaN(y)) {
      return Number.isNaN(x) - Number.isNaN(y) || a.localeCompare(b);
    }
    return x - y;
  };
  headings.forEach((heading, column) => heading.firstElementChild.addEventListener("click", () => {
    const down = heading.ariaSort === "ascending";
    headings.forEach(other => other.removeAttribute("aria-sort"));
    heading.ariaSort = down ? "descending" : "ascending";
    const key = row => row.cells[column].dataset.sort;
    const empty = row => key(row) === "" || key(row) === "nan";
    const rows = [...body.rows].sort((a, b) =>
      empty(a) - empty(b) || (down ? compare(key(b), key(a)) : compare(key(a), key(b))));
    body.append(...rows);
  }));
}
