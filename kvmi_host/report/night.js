/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The filter of the rules' table. Without it, the table has all rules. */
"use strict";
(() => {
  const form = document.querySelector(".filter");
  if (!form) return;
  const text = document.getElementById("filter-text");
  const outcome = document.getElementById("filter-outcome");
  const count = document.getElementById("filter-count");
  const groups = [...document.querySelectorAll("table.rules tbody")].map((body) => ({
    body,
    title: body.rows[0].textContent.toLowerCase(),
    rows: [...body.rows].slice(1).map((row) => ({
      row,
      words: row.textContent.toLowerCase(),
      kinds: row.dataset.kinds.split(" "),
    })),
  }));
  const show = () => {
    const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    let all = 0;
    for (const group of groups) {
      let here = 0;
      for (const rule of group.rows) {
        const found =
          words.every((word) => rule.words.includes(word) || group.title.includes(word)) &&
          (!outcome.value || rule.kinds.includes(outcome.value));
        rule.row.hidden = !found;
        here += found;
      }
      group.body.hidden = !here;
      shown += here;
      all += group.rows.length;
    }
    count.textContent = shown === all ? `${all} rows` : `${shown} of ${all} rows`;
  };
  const showAll = () => {
    text.value = outcome.value = "";
    show();
  };
  form.hidden = false;
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", show);
  /* A link to a rule finds it, whatever is filtered. */
  document.addEventListener("click", (event) => {
    if (event.target.closest('a[href^="#group-"], a[href^="#rule-"]')) showAll();
  });
  show();
  for (const box of document.querySelectorAll(".newest")) box.scrollLeft = box.scrollWidth;
})();
