const table = document.querySelector("table");
const heads = [...table.querySelectorAll("th")];

// A figure as a number; ∞ is above all, what has none stays below whichever way the table is sorted.
const number = (text) => (text === "∞" ? Infinity : text === "–" ? NaN : Number(text));

heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
  const rising = head.getAttribute("aria-sort") !== "ascending";
  heads.forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", rising ? "ascending" : "descending");
  const text = (row) => row.cells[column].textContent;
  const order = (a, b) => {
    if (column === 0) return text(a) < text(b) ? -1 : text(a) > text(b) ? 1 : 0;
    const [x, y] = [number(text(a)), number(text(b))];
    if (Number.isNaN(x) || Number.isNaN(y)) return (Number.isNaN(x) - Number.isNaN(y)) * (rising ? 1 : -1);
    return x === y ? 0 : x < y ? -1 : 1;
  };
  const rows = [...table.tBodies[0].rows].sort((a, b) => (rising ? order(a, b) : -order(a, b)));
  table.tBodies[0].append(...rows);
}));
